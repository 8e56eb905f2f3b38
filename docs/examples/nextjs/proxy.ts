// Runs before each request (`middleware.ts` before Next.js 16). An app that has one calls updateSession in it.
import type { NextRequest } from 'next/server'
import { updateSession } from './lib/supabase/proxy'

export async function proxy(request: NextRequest) {
  return await updateSession(request)
}

export const config = {
  // Not for files, nor for the trainer's callbacks, which have no session.
  matcher: ['/((?!_next/static|_next/image|favicon.ico|api/hooks/|.*\\.(?:svg|png|jpg|jpeg|gif|webp)$).*)'],
}
