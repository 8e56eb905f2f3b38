'use client'
// Choose a dataset and a base model, and start.
import { useActionState } from 'react'
import { submit } from '../app/actions'

export function NewTraining({ datasets }: { datasets: { id: string; name: string | null }[] }) {
  const [answer, act, busy] = useActionState(submit, {})
  return (
    <form action={act}>
      <label>
        Dataset{' '}
        <select name="dataset" required>
          {datasets.map(({ id, name }) => (
            <option key={id} value={id}>
              {name ?? id}
            </option>
          ))}
        </select>
      </label>{' '}
      <label>
        Base model <input name="base_model" defaultValue="Qwen/Qwen3-8B" required />
      </label>{' '}
      <label>
        Epochs <input name="num_epochs" type="number" min={1} max={50} defaultValue={3} />
      </label>{' '}
      <label>
        Rank <input name="lora_rank" type="number" min={8} max={128} defaultValue={16} />
      </label>{' '}
      <button disabled={busy || datasets.length === 0}>Start</button>
      {answer.trouble && <p role="alert">{answer.trouble}</p>}
    </form>
  )
}
