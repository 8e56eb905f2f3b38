// Upload a dataset, choose one and start, see your trainings.
import Link from 'next/link'
import { redirect } from 'next/navigation'
import { NewDataset } from '../components/NewDataset'
import { NewTraining } from '../components/NewTraining'
import { serverClient, signedInUser } from '../lib/supabase/server'
import { signOut } from './login/actions'

export default async function Page() {
  const supabase = await serverClient()
  const userId = await signedInUser(supabase)
  if (!userId) redirect('/login')
  const newest = { ascending: false }
  const [datasets, jobs] = await Promise.all([
    supabase.from('datasets').select('id, name').is('deleted_at', null).order('created_at', newest).limit(50),
    supabase.from('training_jobs').select('id, status, progress').order('created_at', newest).limit(20),
  ])
  const error = datasets.error ?? jobs.error
  if (error) throw error
  return (
    <main>
      <h1>Train a model</h1>
      <NewDataset userId={userId} />
      <NewTraining datasets={datasets.data ?? []} />
      <h2>Your trainings</h2>
      <ul>
        {(jobs.data ?? []).map((job) => (
          <li key={job.id}>
            <Link href={`/jobs/${job.id}`}>{job.id}</Link>: {job.status} {job.progress} %
          </li>
        ))}
      </ul>
      <form action={signOut}>
        <button>Sign out</button>
      </form>
    </main>
  )
}
