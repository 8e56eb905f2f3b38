'use client'
// Choose one of your datasets and start.
import { useEffect, useState } from 'react'
import { browserClient } from '../lib/supabase'
import { startTraining } from '../lib/training'

type Choice = { id: string; name: string | null; user_id: string }

export default function Page() {
  const [datasets, setDatasets] = useState<Choice[]>([])
  const [trouble, setTrouble] = useState<string>()

  useEffect(() => {
    const load = async () => {
      const { data, error } = await browserClient()
        .from('datasets')
        .select('id, name, user_id')
        .eq('training_ready', true)
        .order('created_at', { ascending: false })
      if (error) setTrouble(error.message)
      setDatasets(data ?? [])
    }
    void load()
  }, [])

  const start = async (dataset: Choice) => {
    try {
      const chosen = { base_model: 'Qwen/Qwen3-8B', num_epochs: 3, lora_rank: 16 }
      const id = await startTraining(browserClient(), dataset.user_id, dataset.id, chosen)
      window.location.assign(`/jobs/${id}`)
    } catch (error) {
      setTrouble((error as { message: string }).message)
    }
  }

  return (
    <main>
      <h1>Train on</h1>
      {datasets.map((dataset) => (
        <button key={dataset.id} onClick={() => start(dataset)}>
          {dataset.name ?? dataset.id}
        </button>
      ))}
      {trouble && <p role="alert">{trouble}</p>}
    </main>
  )
}
