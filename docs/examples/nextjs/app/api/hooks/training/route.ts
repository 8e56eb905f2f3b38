// Where the trainer posts each change of state: callback_url = https://<your app>/api/hooks/training
import { verifyCallback } from '../../../../lib/verify-callback'

export async function POST(request: Request): Promise<Response> {
  const secret = process.env.TRAINER_CALLBACK_SECRET
  if (!secret) return new Response('TRAINER_CALLBACK_SECRET is not set', { status: 500 })
  // The text as it came: JSON that was parsed and written again has another signature.
  const body = await request.text()
  try {
    const callback = verifyCallback(body, request.headers, secret)
    if (callback.event === 'job.completed') console.log('adapter ready', callback.job_id, callback.adapter_path)
    if (callback.event === 'job.failed') console.log('failed', callback.job_id, callback.error_code)
  } catch (error) {
    return new Response(String(error), { status: 401 })
  }
  return new Response(null, { status: 204 })
}
