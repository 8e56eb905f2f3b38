'use server'
// What a user may do, run on the server. Each asks first who it is: an action can be called by anybody.
import { revalidatePath } from 'next/cache'
import { redirect } from 'next/navigation'
import { serverClient, signedInUser } from '../lib/supabase/server'
import type { Client } from '../lib/supabase/types'
import { addDataset, cancelTraining, retryTraining, startTraining } from '../lib/training'

/** What went wrong, in words for the user. Of an error that is thrown, the browser is told nothing in production. */
export type Answer = { trouble?: string }

async function asUser(act: (supabase: Client, userId: string) => Promise<void>): Promise<Answer> {
  const supabase = await serverClient()
  const userId = await signedInUser(supabase)
  if (!userId) return { trouble: 'Sign in first.' }
  try {
    await act(supabase, userId)
    return {}
  } catch (error) {
    return { trouble: (error as { message: string }).message }
  }
}

export async function add(file: { path: string; name: string; bytes: number }): Promise<Answer> {
  const answer = await asUser(async (supabase, userId) => void (await addDataset(supabase, userId, file)))
  revalidatePath('/')
  return answer
}

export async function submit(_: Answer, form: FormData): Promise<Answer> {
  let jobId = ''
  const answer = await asUser(async (supabase, userId) => {
    jobId = await startTraining(supabase, userId, String(form.get('dataset')), {
      base_model: String(form.get('base_model')),
      num_epochs: Number(form.get('num_epochs')),
      lora_rank: Number(form.get('lora_rank')),
    })
  })
  // Outside of what catches errors: Next.js redirects by throwing one.
  if (!answer.trouble) redirect(`/jobs/${jobId}`)
  return answer
}

export async function cancel(jobId: string): Promise<Answer> {
  return await asUser((supabase) => cancelTraining(supabase, jobId))
}

export async function retry(jobId: string): Promise<Answer> {
  return await asUser((supabase) => retryTraining(supabase, jobId))
}
