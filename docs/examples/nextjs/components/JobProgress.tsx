'use client'
// One job as its user sees it: how far, how good, how long still, and what can be done.
import { useEffect, useState, useTransition } from 'react'
import { cancel, retry } from '../app/actions'
import { browserClient } from '../lib/supabase/client'
import type { Job } from '../lib/supabase/types'
import { watchJob } from '../lib/watch'

const UNFINISHED = ['queued', 'initializing', 'running']

type Metrics = { training_loss?: number | null; throughput?: number | null }

export function JobProgress({ jobId }: { jobId: string }) {
  const [job, setJob] = useState<Job>()
  const [trouble, setTrouble] = useState<string>()
  const [busy, start] = useTransition()

  useEffect(() => watchJob(browserClient(), jobId, setJob, setTrouble), [jobId])

  if (!job) return <p role="status">{trouble ?? 'Loading …'}</p>
  const metrics = (job.current_metrics ?? {}) as Metrics
  const act = (move: typeof cancel) => () => start(async () => setTrouble((await move(jobId)).trouble))

  return (
    <section aria-busy={job.status === 'running'}>
      <h2>
        {job.base_model ?? 'Default model'}: {job.status}
      </h2>
      <label>
        {job.current_stage} {job.current_step} / {job.total_steps ?? '?'}{' '}
        <progress max={100} value={job.progress ?? 0} />
      </label>
      {metrics.training_loss != null && <p>Loss {metrics.training_loss.toFixed(3)}</p>}
      {job.estimated_completion_at && (
        <p>Ready at about {new Date(job.estimated_completion_at).toLocaleTimeString()}</p>
      )}
      <p>${(job.final_cost ?? job.current_cost ?? 0).toFixed(2)} so far</p>
      {job.error_message && <p role="alert">{job.error_message}</p>}
      {UNFINISHED.includes(job.status ?? '') && (
        <button disabled={busy} onClick={act(cancel)}>
          Cancel
        </button>
      )}
      {(job.status === 'failed' || job.status === 'cancelled') && (
        <button disabled={busy} onClick={act(retry)}>
          Try again
        </button>
      )}
      {job.artifact_id && (
        <p>
          {/* Not <Link>, which would fetch the file before anybody asks for it. */}
          <a href={`/api/artifacts/${job.artifact_id}`}>Download the adapter</a>
        </p>
      )}
      {trouble && <p role="alert">{trouble}</p>}
    </section>
  )
}
