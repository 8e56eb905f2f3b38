// How the example follows a job, run by Node against a server that is played here: `node --test`, with LIB naming the
// folder of the compiled example. tests/docs/test_typescript.py runs it.
import assert from 'node:assert/strict'
import { test } from 'node:test'

const { JobRow, Story } = await import(`${process.env.LIB}/merge.js`)
const { followStory, watchJob } = await import(`${process.env.LIB}/watch.js`)

const at = (seconds) => `2026-11-28T05:00:${String(seconds).padStart(2, '0')}.123456+00:00`
const row = (changes) => ({ id: 'job', status: 'running', progress: 0, updated_at: at(0), hyperparameters: { r: 16 }, ...changes })
const settle = () => new Promise((done) => setImmediate(() => setImmediate(done)))

/** A project: tables, answers that come when `answer` is called, and one channel for each subscription. */
class Project {
  tables = { training_jobs: [], training_events: [] }
  channels = []
  waiting = []
  failing = false
  signedIn = false
  realtime = { setAuth: async () => { await settle(); this.signedIn = true } }

  from(table) {
    const conditions = []
    let most = Infinity
    const reading = (one) => {
      // What is read is what was there when it was asked for, however late the answer is.
      const found = this.tables[table].filter((row) => conditions.every((holds) => holds(row)))
      const data = structuredClone(found.sort((a, b) => a.id - b.id).slice(0, most))
      const answer = this.failing ? { data: null, error: { message: 'away' } } : { data: one ? data[0] ?? null : data, error: null }
      return new Promise((resolve) => this.waiting.push(() => resolve(answer)))
    }
    const query = {
      select: () => query,
      order: () => query,
      eq: (column, value) => { conditions.push((row) => row[column] === value); return query },
      gt: (column, value) => { conditions.push((row) => row[column] > value); return query },
      limit: (count) => { most = Math.min(count, 2); return query },
      maybeSingle: () => reading(true),
      then: (...handlers) => reading(false).then(...handlers),
    }
    return query
  }

  channel(name, options) {
    const channel = { name, options, on: (kind, filter, hear) => { channel[kind] = hear; return channel } }
    channel.subscribe = (hear) => { assert.ok(this.signedIn, 'joined without the token'); channel.status = hear }
    this.channels.push(channel)
    return channel
  }

  removeChannel(channel) { channel.removed = true }

  async answer() {
    for (await settle(); this.waiting.length; await settle()) this.waiting.shift()()
  }
}

test('a column that did not change is missing in a change and is kept', () => {
  const known = new JobRow()
  known.reading()
  known.read(row())
  const { hyperparameters, ...change } = row({ progress: 5, updated_at: at(1) })
  assert.deepEqual(known.changed(change), row({ progress: 5, updated_at: at(1) }))
})

test('a change that came during the read counts if it is newer than what was read', () => {
  const known = new JobRow()
  known.reading()
  assert.equal(known.changed({ progress: 5, updated_at: at(5) }), undefined)
  assert.equal(known.read(row({ progress: 4, updated_at: at(4) })).progress, 5)
  known.reading()
  known.changed({ progress: 6, updated_at: at(6) })
  assert.equal(known.read(row({ progress: 9, updated_at: at(9) })).progress, 9)
})

test('an end counts although a cancel that waited for the row bears an earlier time', () => {
  const known = new JobRow()
  known.reading()
  known.changed({ status: 'cancelled', updated_at: at(3) })
  assert.equal(known.read(row({ progress: 4, updated_at: at(4) })).status, 'cancelled')
  known.reading()
  known.read(row({ progress: 5, updated_at: at(5) }))
  assert.equal(known.changed({ status: 'cancelled', updated_at: at(4) }).status, 'cancelled')
})

test('a read that failed loses no change', () => {
  const known = new JobRow()
  known.reading()
  known.read(row())
  known.reading()
  known.changed({ progress: 5, updated_at: at(5) })
  assert.equal(known.read(null).progress, 5)
})

test('each line of a story once, in order', () => {
  const story = new Story()
  assert.deepEqual(story.add([{ id: 3 }, { id: 1 }]), [{ id: 1 }, { id: 3 }])
  assert.equal(story.add([{ id: 3 }]), undefined)
  assert.deepEqual(story.add([{ id: 2 }]), [{ id: 1 }, { id: 2 }, { id: 3 }])
})

test('a job is read at once, again when changes are sent, and after each reconnect', async () => {
  const project = new Project()
  const shown = []
  project.tables.training_jobs = [row()]
  const end = watchJob(project, 'job', (job) => shown.push(job.progress), () => {})
  await project.answer()
  assert.deepEqual(shown, [0])
  const [channel] = project.channels
  assert.equal(channel.options.config.postgres_changes_options.wait, true)
  for (const [seconds, tell] of [
    [1, () => channel.status('SUBSCRIBED')],
    [2, () => channel.system({ extension: 'postgres_changes', status: 'ok' })],
    [3, () => channel.status('SUBSCRIBED')],
    // Too large to be sent.
    [4, () => channel.postgres_changes({ new: {}, errors: ['Error 413: Payload Too Large'] })],
  ]) {
    // Nobody was told of this change.
    project.tables.training_jobs = [row({ progress: seconds, updated_at: at(seconds) })]
    tell()
    await project.answer()
  }
  channel.postgres_changes({ new: { progress: 5, updated_at: at(5) }, errors: null })
  assert.deepEqual(shown, [0, 1, 2, 3, 4, 5])
  end()
  assert.ok(channel.removed)
  channel.postgres_changes({ new: { progress: 6, updated_at: at(6) }, errors: null })
  channel.status('SUBSCRIBED')
  await project.answer()
  assert.deepEqual(shown, [0, 1, 2, 3, 4, 5])
})

test('a read asked for during a read follows it: the first may have looked too early', async () => {
  const project = new Project()
  const shown = []
  project.tables.training_jobs = [row()]
  watchJob(project, 'job', (job) => shown.push(job.progress), () => {})
  await settle()
  project.tables.training_jobs = [row({ progress: 7, updated_at: at(7) })]
  await settle()
  project.channels[0].status('SUBSCRIBED')
  await project.answer()
  assert.deepEqual(shown, [0, 7])
})

test('a failed read is said, tried again, and no more said', async (t) => {
  t.mock.timers.enable({ apis: ['setTimeout'] })
  const project = new Project()
  const [shown, said] = [[], []]
  project.failing = true
  project.tables.training_jobs = [row()]
  watchJob(project, 'job', (job) => shown.push(job.progress), (trouble) => said.push(trouble))
  await project.answer()
  assert.deepEqual([shown, said], [[], ['away']])
  project.failing = false
  t.mock.timers.tick(5000)
  await project.answer()
  assert.deepEqual([shown, said], [[0], ['away', undefined]])
})

test('somebody else\'s job is said to be none', async () => {
  const project = new Project()
  const said = []
  watchJob(project, 'job', () => assert.fail(), (trouble) => said.push(trouble))
  await project.answer()
  assert.deepEqual(said, ['You have no such job.'])
})

test('no line of a story is lost or doubled, over pages, a late commit and a lost connection', async () => {
  const project = new Project()
  const events = project.tables.training_events
  let shown = []
  const happens = (id, told) => {
    events.push({ id, job_id: 'job' })
    if (told) project.channels[0].postgres_changes({ new: { id, job_id: 'job' }, errors: null })
  }
  for (const id of [1, 2, 3, 5]) happens(id, false)
  events.push({ id: 4, job_id: 'another' })
  followStory(project, 'job', (lines) => (shown = lines.map(({ id }) => id)), () => {})
  happens(6, false)
  await project.answer()
  project.channels[0].status('SUBSCRIBED')
  happens(8, true)
  await project.answer()
  happens(9, true)
  assert.deepEqual(shown, [1, 2, 3, 5, 6, 8, 9])
  // The connection is lost. 7 began before 8 and is committed only now.
  happens(7, false)
  happens(10, false)
  project.channels[0].status('SUBSCRIBED')
  happens(11, true)
  await project.answer()
  assert.deepEqual(shown, [1, 2, 3, 5, 6, 7, 8, 9, 10, 11])
})
