'use client'
// What happened to a job, line by line.
import { useEffect, useState } from 'react'
import { browserClient } from '../lib/supabase/client'
import type { StoryEvent } from '../lib/supabase/types'
import { followStory } from '../lib/watch'

export function JobStory({ jobId }: { jobId: string }) {
  const [lines, setLines] = useState<StoryEvent[]>([])
  const [trouble, setTrouble] = useState<string>()

  useEffect(() => followStory(browserClient(), jobId, setLines, setTrouble), [jobId])

  return (
    <section>
      <h2>Story</h2>
      <ol>
        {lines.map(({ id, at, kind, message }) => (
          <li key={id}>
            <time dateTime={at}>{new Date(at).toLocaleTimeString()}</time> {message || kind}
          </li>
        ))}
      </ol>
      {trouble && <p role="alert">{trouble}</p>}
    </section>
  )
}
