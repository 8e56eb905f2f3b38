// Renews the session before a page is rendered: pages cannot set cookies, and a token lives for an hour.
import { createServerClient } from '@supabase/ssr'
import { NextResponse, type NextRequest } from 'next/server'
import { publishableKey, url } from './settings'

export async function updateSession(request: NextRequest): Promise<NextResponse> {
  let response = NextResponse.next({ request })
  const supabase = createServerClient(url(), publishableKey(), {
    cookies: {
      getAll: () => request.cookies.getAll(),
      setAll: (changed, headers) => {
        // Into the request for the page that is about to be rendered, into the response for the browser.
        for (const { name, value } of changed) request.cookies.set(name, value)
        response = NextResponse.next({ request })
        for (const { name, value, options } of changed) response.cookies.set(name, value, options)
        // No cache may keep an answer that holds a session.
        for (const [name, value] of Object.entries(headers)) response.headers.set(name, value)
      },
    },
  })
  // Nothing between the client and this line: it is what renews a session that has expired.
  await supabase.auth.getClaims()
  // Return this very response, or copy its cookies: without them the user is signed out at random.
  return response
}
