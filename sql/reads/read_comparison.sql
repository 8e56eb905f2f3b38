-- Reads one comparison without its prompts. No row means that there is none of this id.
SELECT id, user_id, base_model, contestants, options, held_out, notes, prompts_are_held_out, created_at
FROM public.training_comparisons
WHERE id = %(comparison_id)s
