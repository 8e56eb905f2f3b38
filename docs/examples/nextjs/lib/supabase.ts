// Two clients: one that acts as the signed-in user, under row level security, and the server's own.
import { createClient, type SupabaseClient } from '@supabase/supabase-js'
import type { Database } from './database.types'

export type Client = SupabaseClient<Database>
type Tables = Database['public']['Tables']
// Without the computed field training_status_json, which `select('*')` and Realtime do not send.
export type Job = Omit<Tables['training_jobs']['Row'], Tables['training_jobs']['ComputedFields']>
export type StoryEvent = Tables['training_events']['Row']

function required(name: string, value: string | undefined): string {
  if (!value) throw new Error(`${name} is not set: copy .env.example to .env.local and fill it in`)
  return value
}

// Next.js puts NEXT_PUBLIC_ variables into the browser's code where they are named in full, not by a variable.
const url = () => required('NEXT_PUBLIC_SUPABASE_URL', process.env.NEXT_PUBLIC_SUPABASE_URL)
const publishableKey = () => required('NEXT_PUBLIC_SUPABASE_KEY', process.env.NEXT_PUBLIC_SUPABASE_KEY)

let browser: Client | undefined

/** In the browser: the session of whoever is signed in. One client a page, so that one socket serves all. */
export function browserClient(): Client {
  browser ??= createClient<Database>(url(), publishableKey())
  return browser
}

/** On the server, for one request: acts as the user whose access token it is. */
export function clientOf(accessToken: string): Client {
  return createClient<Database>(url(), publishableKey(), { accessToken: async () => accessToken })
}

/** On the server only: sees everything. Use it for what no user may do, such as signing a path. */
export function serverClient(): Client {
  const key = required('SUPABASE_SECRET_KEY', process.env.SUPABASE_SECRET_KEY)
  return createClient<Database>(url(), key, { auth: { persistSession: false } })
}
