// In the browser: acts as whoever is signed in, by the session in the cookies.
import { createBrowserClient } from '@supabase/ssr'
import type { Database } from '../database.types'
import { publishableKey, url } from './settings'
import type { Client } from './types'

/** One client a page, however often it is called, so that one socket serves all. */
export function browserClient(): Client {
  return createBrowserClient<Database>(url(), publishableKey())
}
