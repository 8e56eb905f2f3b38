// Where the project is. Both values are public: they are in the browser's code.
function required(name: string, value: string | undefined): string {
  if (!value) throw new Error(`${name} is not set: copy .env.example to .env.local and fill it in`)
  return value
}

// Next.js puts NEXT_PUBLIC_ variables into the browser's code where they are named in full, not by a variable.
export const url = () => required('NEXT_PUBLIC_SUPABASE_URL', process.env.NEXT_PUBLIC_SUPABASE_URL)
export const publishableKey = () =>
  required('NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY', process.env.NEXT_PUBLIC_SUPABASE_PUBLISHABLE_KEY)
