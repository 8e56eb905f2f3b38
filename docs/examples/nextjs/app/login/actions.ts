'use server'
import { redirect } from 'next/navigation'
import { serverClient } from '../../lib/supabase/server'
import type { Answer } from '../actions'

export async function signIn(_: Answer, form: FormData): Promise<Answer> {
  const supabase = await serverClient()
  const { error } = await supabase.auth.signInWithPassword({
    email: String(form.get('email')),
    password: String(form.get('password')),
  })
  if (error) return { trouble: error.message }
  redirect('/')
}

export async function signOut(): Promise<void> {
  const supabase = await serverClient()
  await supabase.auth.signOut()
  redirect('/login')
}
