// Follows a job in the browser: what is read, and what Realtime sends, without a gap between the two.
import { JobRow, Story } from './merge'
import type { Client, Job, StoryEvent } from './supabase/types'

const PAGE = 1000
const RETRY_SECONDS = 5

/** Call `show` with the job now and at each of its changes, `say` with what is wrong or no more. Returns what ends it. */
export function watchJob(
  supabase: Client,
  jobId: string,
  show: (job: Job) => void,
  say: (trouble: string | undefined) => void,
): () => void {
  const known = new JobRow()
  const read = async () => {
    known.reading()
    const { data, error } = await supabase.from('training_jobs').select('*').eq('id', jobId).maybeSingle()
    const job = known.read(data)
    if (job) show(job)
    if (error) throw error
    say(data ? undefined : 'You have no such job.')
  }
  const hear = (change: Partial<Job>) => {
    const job = known.changed(change)
    if (job) show(job)
  }
  return follow(supabase, { event: 'UPDATE', table: 'training_jobs', filter: `id=eq.${jobId}` }, read, hear, say)
}

/** Call `show` with all lines of the job's story now and at each new one. Returns what ends it. */
export function followStory(
  supabase: Client,
  jobId: string,
  show: (lines: StoryEvent[]) => void,
  say: (trouble: string | undefined) => void,
): () => void {
  const story = new Story()
  const add = (events: StoryEvent[]) => {
    const lines = story.add(events)
    if (lines) show(lines)
  }
  // From the beginning each time: an event with a smaller number may be committed after one with a larger.
  const read = async () => {
    for (let last = 0; ; ) {
      const { data, error } = await supabase
        .from('training_events')
        .select('*')
        .eq('job_id', jobId)
        .gt('id', last)
        .order('id')
        .limit(PAGE)
      if (error) throw error
      add(data)
      const end = data.at(-1)
      if (!end) return say(undefined)
      last = end.id
    }
  }
  const hear = (event: StoryEvent) => add([event])
  return follow(supabase, { event: 'INSERT', table: 'training_events', filter: `job_id=eq.${jobId}` }, read, hear, say)
}

type Changes = { event: 'UPDATE' | 'INSERT'; table: string; filter: string }

let channels = 0

/** Read now, listen, and read again whenever a change may have been missed. */
function follow<Row extends Record<string, unknown>>(
  supabase: Client,
  changes: Changes,
  read: () => Promise<void>,
  hear: (row: Row) => void,
  say: (trouble: string | undefined) => void,
): () => void {
  let ended = false
  let running: Promise<void> | undefined
  let again = false

  // One read at a time: asked for meanwhile, another follows, because the first may have looked too early.
  const catchUp = () => {
    if (ended) return
    if (running) {
      again = true
      return
    }
    again = false
    running = read()
      .catch((error: { message: string }) => {
        if (ended) return
        say(error.message)
        setTimeout(catchUp, RETRY_SECONDS * 1000)
      })
      .finally(() => {
        running = undefined
        if (again) catchUp()
      })
  }

  catchUp()
  // A name of its own for each: two parts of a page may follow the same job.
  const channel = supabase
    // Report SUBSCRIBED when changes are sent, not when the channel was joined: those between were sent to nobody.
    .channel(`training-${++channels}`, { config: { postgres_changes_options: { wait: true } } })
    .on<Row>('postgres_changes', { ...changes, schema: 'public' } as const, (change) => {
      if (ended) return
      // Too large to be sent, say: only a read shows it.
      if (change.errors?.length) catchUp()
      else hear(change.new as Row)
    })
    // What a server says that does not know `wait`.
    .on('system', {}, (message: { extension?: string; status?: string }) => {
      if (message.extension === 'postgres_changes' && message.status === 'ok') catchUp()
    })
  // The user's token first: a channel that is joined without it hears nothing.
  void supabase.realtime.setAuth().then(() => {
    if (ended) return
    channel.subscribe((status) => {
      // Also after every reconnect.
      if (status === 'SUBSCRIBED') catchUp()
    })
  })
  return () => {
    ended = true
    void supabase.removeChannel(channel)
  }
}
