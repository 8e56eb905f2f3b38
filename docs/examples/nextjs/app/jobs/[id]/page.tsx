import Link from 'next/link'
import { redirect } from 'next/navigation'
import { JobProgress } from '../../../components/JobProgress'
import { JobStory } from '../../../components/JobStory'
import { serverClient, signedInUser } from '../../../lib/supabase/server'

export default async function Page({ params }: { params: Promise<{ id: string }> }) {
  const { id } = await params
  if (!(await signedInUser(await serverClient()))) redirect('/login')
  return (
    <main>
      <Link href="/">All trainings</Link>
      <JobProgress jobId={id} />
      <JobStory jobId={id} />
    </main>
  )
}
