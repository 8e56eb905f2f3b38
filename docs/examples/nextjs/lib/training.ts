// What the app does with training jobs: insert, watch, cancel, try again, download.
import type { Client, Job, StoryEvent } from './supabase'

export type Hyperparameters = {
  base_model: string
  num_epochs?: number
  learning_rate?: number
  batch_size?: number
  lora_rank?: number
  lora_alpha?: number
  lora_dropout?: number
}

/** Insert a job. Everything but the owner and the dataset has a working default. */
export async function startTraining(
  supabase: Client,
  userId: string,
  datasetId: string,
  hyperparameters: Hyperparameters,
): Promise<string> {
  const { data, error } = await supabase
    .from('training_jobs')
    .insert({ user_id: userId, dataset_id: datasetId, hyperparameters })
    .select('id')
    .single()
  if (error) throw error
  return data.id
}

/** Train on a file from the web. `jobId`, an id of your own, makes a repeated call harmless. */
export async function startTrainingFromUrl(
  supabase: Client,
  datasetUrl: string,
  hyperparameters: Hyperparameters,
  jobId: string,
): Promise<unknown> {
  const { data, error } = await supabase.rpc('submit_training_job', {
    job: { job_id: jobId, dataset_url: datasetUrl, hyperparameters },
  })
  if (error) throw error
  return data
}

/** Call `show` with the job now and at each of its changes. Returns what ends it. */
export function watchJob(supabase: Client, jobId: string, show: (job: Job) => void): () => void {
  let newest = ''
  const showNewer = (job: Job) => {
    // The first read and the first message may cross: never go back in time.
    if ((job.updated_at ?? '') < newest) return
    newest = job.updated_at ?? ''
    show(job)
  }
  const channel = supabase
    .channel(`job-${jobId}`)
    .on<Job>(
      'postgres_changes',
      { event: 'UPDATE', schema: 'public', table: 'training_jobs', filter: `id=eq.${jobId}` },
      ({ new: job }) => showNewer(job),
    )
    .subscribe(async (status) => {
      // Read only now, and again after every reconnect: what changed meanwhile was sent to nobody.
      if (status !== 'SUBSCRIBED') return
      const { data } = await supabase.from('training_jobs').select('*').eq('id', jobId).maybeSingle()
      if (data) showNewer(data)
    })
  return () => void supabase.removeChannel(channel)
}

/** Call `tell` with each new line of the job's story. Returns what ends it. */
export function followStory(supabase: Client, jobId: string, tell: (event: StoryEvent) => void): () => void {
  const channel = supabase
    .channel(`story-${jobId}`)
    .on<StoryEvent>(
      'postgres_changes',
      { event: 'INSERT', schema: 'public', table: 'training_events', filter: `job_id=eq.${jobId}` },
      ({ new: event }) => tell(event),
    )
    .subscribe()
  return () => void supabase.removeChannel(channel)
}

/** Cancel. The row says so at once; the host stops within seconds. */
export async function cancelTraining(supabase: Client, jobId: string): Promise<void> {
  const { error } = await supabase.rpc('cancel_training_job', { job_id: jobId })
  if (error) throw error
}

/** Try a failed or cancelled job again: it goes on from its last checkpoint. */
export async function retryTraining(supabase: Client, jobId: string): Promise<void> {
  const { error } = await supabase.rpc('retry_training_job', { job_id: jobId })
  if (error) throw error
}

/** On the server: links, valid for ten minutes, to the files of an adapter that belongs to this user. */
export async function downloadLinks(
  user: Client,
  server: Client,
  artifactId: string,
): Promise<Record<string, string> | null> {
  // Asked as the user, so that row level security decides whose adapter it is.
  const { data: model, error } = await user
    .from('model_artifacts')
    .select('artifacts')
    .eq('id', artifactId)
    .maybeSingle()
  if (error) throw error
  if (!model) return null
  const links: Record<string, string> = {}
  for (const [name, path] of Object.entries(model.artifacts as Record<string, string>)) {
    const { data, error } = await server.storage
      .from('lora-models')
      .createSignedUrl(path, 600, { download: path.split('/').pop() ?? true })
    if (error) throw error
    links[name] = data.signedUrl
  }
  return links
}
