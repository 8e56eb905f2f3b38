// Is this callback from the trainer? Standard Webhooks, with nothing but Node's own crypto.
import { createHmac, timingSafeEqual } from 'node:crypto'

export type Callback = {
  job_id: string
  event: string
  sequence: number | null
  state: string
  progress: number
  adapter_path: string | null
  error_code: string | null
  error_message: string | null
}

/** The message, if it was signed with `secret` (whsec_…) in the last five minutes. Throws otherwise. */
export function verifyCallback(body: string, headers: Headers, secret: string): Callback {
  const id = headers.get('webhook-id')
  const timestamp = headers.get('webhook-timestamp')
  const signatures = headers.get('webhook-signature')
  if (!id || !timestamp || !signatures) throw new Error('not a signed callback')
  if (!(Math.abs(Date.now() / 1000 - Number(timestamp)) < 300)) throw new Error('signed too long ago')
  const key = Buffer.from(secret.replace(/^whsec_/, ''), 'base64')
  const expected = createHmac('sha256', key).update(`${id}.${timestamp}.${body}`).digest()
  // One signature for each secret of the trainer, so that secrets can be changed without a gap.
  const genuine = signatures.split(' ').some((signature) => {
    const given = Buffer.from(signature.replace(/^v1,/, ''), 'base64')
    return given.length === expected.length && timingSafeEqual(given, expected)
  })
  if (!genuine) throw new Error('wrong signature')
  return JSON.parse(body) as Callback
}
