'use client'
// A file from the user's disk to Storage. It goes there from the browser, and not through the app's server.
import { useState, type ChangeEvent } from 'react'
import { add } from '../app/actions'
import { browserClient } from '../lib/supabase/client'
import { uploadDataset } from '../lib/training'

export function NewDataset({ userId }: { userId: string }) {
  const [said, setSaid] = useState<string>()

  const upload = async (event: ChangeEvent<HTMLInputElement>) => {
    const input = event.currentTarget
    const file = input.files?.[0]
    if (!file) return
    setSaid(`Uploading ${file.name} …`)
    try {
      const supabase = browserClient()
      const path = await uploadDataset(supabase, userId, file)
      const { trouble } = await add({ path, name: file.name, bytes: file.size })
      // A file that no row names would lie there for ever.
      if (trouble) await supabase.storage.from('lora-datasets').remove([path])
      setSaid(trouble ?? `${file.name} is stored.`)
    } catch (error) {
      setSaid((error as { message: string }).message)
    }
    input.value = ''
  }

  return (
    <p>
      <label>
        New dataset <input type="file" accept=".jsonl,.json" onChange={upload} />
      </label>{' '}
      <span role="status">{said}</span>
    </p>
  )
}
