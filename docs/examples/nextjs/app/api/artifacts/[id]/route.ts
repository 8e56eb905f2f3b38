// The adapter for its owner: /api/artifacts/<id> leads to the whole archive, ?file=adapter_config to one of its files.
import { serverClient, signedInUser } from '../../../../lib/supabase/server'
import { downloadLink } from '../../../../lib/training'

type Context = { params: Promise<{ id: string }> }

export async function GET(request: Request, { params }: Context): Promise<Response> {
  const supabase = await serverClient()
  if (!(await signedInUser(supabase))) return new Response('sign in first', { status: 401 })
  const { id } = await params
  const file = new URL(request.url).searchParams.get('file') ?? 'archive'
  try {
    const link = await downloadLink(supabase, id, file)
    return link ? Response.redirect(link, 307) : new Response('no such adapter of yours', { status: 404 })
  } catch (error) {
    return new Response((error as { message: string }).message, { status: 502 })
  }
}
