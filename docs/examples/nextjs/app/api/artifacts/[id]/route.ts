// Download links for one adapter, for its owner.
import { clientOf, serverClient } from '../../../../lib/supabase'
import { downloadLinks } from '../../../../lib/training'

type Context = { params: Promise<{ id: string }> }

export async function GET(request: Request, { params }: Context): Promise<Response> {
  const token = request.headers.get('authorization')?.replace(/^Bearer /, '')
  if (!token) return new Response('sign in first', { status: 401 })
  const { id } = await params
  const links = await downloadLinks(clientOf(token), serverClient(), id)
  return links ? Response.json(links) : new Response('no such adapter of yours', { status: 404 })
}
