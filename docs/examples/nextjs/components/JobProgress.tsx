'use client'
// One job as its user sees it: how far, how good, how long still, and what can be done.
import { useEffect, useState } from 'react'
import { browserClient, type Job } from '../lib/supabase'
import { cancelTraining, retryTraining, watchJob } from '../lib/training'

const UNFINISHED = ['queued', 'initializing', 'running']

type Metrics = { training_loss?: number | null; throughput?: number | null }

export function JobProgress({ jobId }: { jobId: string }) {
  const [job, setJob] = useState<Job>()
  const [trouble, setTrouble] = useState<string>()

  useEffect(() => watchJob(browserClient(), jobId, setJob), [jobId])

  if (!job) return <p>Loading…</p>
  const metrics = (job.current_metrics ?? {}) as Metrics
  const act = (move: typeof cancelTraining) => () =>
    move(browserClient(), jobId).catch((error: { message: string }) => setTrouble(error.message))

  return (
    <section aria-busy={job.status === 'running'}>
      <h2>
        {job.base_model ?? 'Default model'}: {job.status}
      </h2>
      <label>
        {job.current_stage} {job.current_step} / {job.total_steps ?? '?'}
        <progress max={100} value={job.progress ?? 0} />
      </label>
      {metrics.training_loss != null && <p>Loss {metrics.training_loss.toFixed(3)}</p>}
      {job.estimated_completion_at && (
        <p>Ready at about {new Date(job.estimated_completion_at).toLocaleTimeString()}</p>
      )}
      <p>${(job.final_cost ?? job.current_cost ?? 0).toFixed(2)} so far</p>
      {job.error_message && <p role="alert">{job.error_message}</p>}
      {UNFINISHED.includes(job.status ?? '') && <button onClick={act(cancelTraining)}>Cancel</button>}
      {(job.status === 'failed' || job.status === 'cancelled') && (
        <button onClick={act(retryTraining)}>Try again</button>
      )}
      {job.artifact_id && <Downloads artifactId={job.artifact_id} />}
      {trouble && <p role="alert">{trouble}</p>}
    </section>
  )
}

function Downloads({ artifactId }: { artifactId: string }) {
  const [links, setLinks] = useState<Record<string, string>>()

  const fetchLinks = async () => {
    const { data } = await browserClient().auth.getSession()
    const answer = await fetch(`/api/artifacts/${artifactId}`, {
      headers: { authorization: `Bearer ${data.session?.access_token ?? ''}` },
    })
    if (answer.ok) setLinks((await answer.json()) as Record<string, string>)
  }

  if (!links) return <button onClick={fetchLinks}>Download</button>
  return (
    <ul>
      {Object.entries(links).map(([name, link]) => (
        <li key={name}>
          <a href={link}>{name}</a>
        </li>
      ))}
    </ul>
  )
}
