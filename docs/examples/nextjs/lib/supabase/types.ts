// The client and the rows, typed by the schema.
import type { SupabaseClient } from '@supabase/supabase-js'
import type { Database } from '../database.types'

export type Client = SupabaseClient<Database>
type Tables = Database['public']['Tables']
// Without the computed field training_status_json, which `select('*')` and Realtime do not send.
export type Job = Omit<Tables['training_jobs']['Row'], Tables['training_jobs']['ComputedFields']>
export type StoryEvent = Tables['training_events']['Row']
