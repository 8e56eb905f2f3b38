// What the app does with training jobs: upload, insert, cancel, try again, download. Each acts as the signed-in user.
import type { Client } from './supabase/types'

export type Hyperparameters = {
  base_model: string
  num_epochs?: number
  learning_rate?: number
  batch_size?: number
  lora_rank?: number
  lora_alpha?: number
  lora_dropout?: number
}

/** In the browser: store the file under its owner's id. Returns its path in the bucket. */
export async function uploadDataset(supabase: Client, userId: string, file: File): Promise<string> {
  // A new path each time, so that no job reads a file that changes; and only characters that Storage allows.
  const path = `${userId}/${crypto.randomUUID()}-${file.name.replace(/[^A-Za-z0-9._-]/g, '_').slice(-100)}`
  const { error } = await supabase.storage.from('lora-datasets').upload(path, file)
  if (error) throw error
  return path
}

/** Tell of a stored file. The database refuses a path that is not below the user's own id. */
export async function addDataset(
  supabase: Client,
  userId: string,
  file: { path: string; name: string; bytes: number },
): Promise<string> {
  const { data, error } = await supabase
    .from('datasets')
    .insert({
      user_id: userId,
      name: file.name.slice(0, 200),
      storage_bucket: 'lora-datasets',
      storage_path: file.path,
      file_name: file.name.slice(-255),
      file_size: file.bytes,
    })
    .select('id')
    .single()
  if (error) throw error
  return data.id
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

/** A link, valid for a minute, to one file of an adapter (`archive` is all of it), or null if the user has no such. */
export async function downloadLink(supabase: Client, artifactId: string, file: string): Promise<string | null> {
  // Asked as the user, so that row level security decides whose adapter it is; Storage's policy decides once more.
  const { data: model, error } = await supabase
    .from('model_artifacts')
    .select('artifacts')
    .eq('id', artifactId)
    .maybeSingle()
  if (error) throw error
  const path = (model?.artifacts as Record<string, string | undefined> | undefined)?.[file]
  if (!path) return null
  const { data, error: refused } = await supabase.storage
    .from('lora-models')
    .createSignedUrl(path, 60, { download: path.split('/').pop() ?? true })
  if (refused) throw refused
  return data.signedUrl
}
