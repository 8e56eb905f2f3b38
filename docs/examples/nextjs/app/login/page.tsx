'use client'
// The smallest sign-in there is. An app that has its own leaves this folder out.
import { useActionState } from 'react'
import { signIn } from './actions'

export default function Page() {
  const [answer, act, busy] = useActionState(signIn, {})
  return (
    <form action={act}>
      <h1>Sign in</h1>
      <label>
        Email <input name="email" type="email" autoComplete="username" required />
      </label>
      <label>
        Password <input name="password" type="password" autoComplete="current-password" required />
      </label>
      <button disabled={busy}>Sign in</button>
      {answer.trouble && <p role="alert">{answer.trouble}</p>}
    </form>
  )
}
