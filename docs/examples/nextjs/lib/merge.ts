// What is known of a job, from rows that were read and changes that came by Realtime. No connection here: plain data.
import type { Job, StoryEvent } from './supabase/types'

const FINAL = ['completed', 'failed', 'cancelled']

/** One row that is read, changed, and read again after each reconnect. */
export class JobRow {
  #row: Job | undefined
  #held: Partial<Job>[] | undefined

  /** Call it before the row is read: changes that come meanwhile may be newer than what will have been read. */
  reading(): void {
    this.#held ??= []
  }

  /** The row as it was read, or null if reading failed, with the changes that came meanwhile. */
  read(row: Job | null): Job | undefined {
    const held = this.#held ?? []
    this.#held = undefined
    if (row) this.#row = row
    const since = row?.updated_at
    for (const change of held) this.#merge(change, since)
    return this.#row
  }

  /** A change that came; the row after it, or undefined while there is nothing new to show. */
  changed(change: Partial<Job>): Job | undefined {
    if (this.#held || !this.#row) {
      this.#held?.push(change)
      return undefined
    }
    this.#merge(change, undefined)
    return this.#row
  }

  #merge(change: Partial<Job>, since: string | null | undefined): void {
    if (!this.#row) return
    // Older than what was read: shown, it would set the bar back. An end counts in any case, because a cancel that had
    // to wait for a progress write bears the earlier time.
    const older = since && change.updated_at && Date.parse(change.updated_at) < Date.parse(since)
    if (older && !FINAL.includes(change.status ?? '')) return
    // Realtime leaves out large columns that did not change (hyperparameters, result): keep those that were read.
    this.#row = { ...this.#row, ...change }
  }
}

/** The story of a job: each line once, in the order of its events, however often it was read or sent. */
export class Story {
  #lines = new Map<number, StoryEvent>()

  /** All lines, or undefined if there is none that is new. */
  add(events: StoryEvent[]): StoryEvent[] | undefined {
    const before = this.#lines.size
    for (const event of events) this.#lines.set(event.id, event)
    if (this.#lines.size === before) return undefined
    return [...this.#lines.values()].sort((one, other) => one.id - other.id)
  }
}
