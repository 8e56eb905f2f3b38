// On the server, for one request: acts as whoever sent the cookies, under row level security. No secret key is needed.
import { createServerClient } from '@supabase/ssr'
import { cookies } from 'next/headers'
import type { Database } from '../database.types'
import { publishableKey, url } from './settings'
import type { Client } from './types'

export async function serverClient(): Promise<Client> {
  const store = await cookies()
  return createServerClient<Database>(url(), publishableKey(), {
    cookies: {
      getAll: () => store.getAll(),
      setAll: (changed) => {
        try {
          for (const { name, value, options } of changed) store.set(name, value, options)
        } catch {
          // While a page is rendered no cookie can be set. proxy.ts has renewed the session before.
        }
      },
    },
  })
}

/** The id of the signed-in user, from a token whose signature was checked; null if nobody is. */
export async function signedInUser(supabase: Client): Promise<string | null> {
  // Never getSession() here: it believes what the cookie says.
  const { data } = await supabase.auth.getClaims()
  return data?.claims.sub ?? null
}
