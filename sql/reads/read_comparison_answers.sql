-- Reads the first prompts of a comparison with all answers.
SELECT number, turns, reference, answers
FROM public.training_comparison_answers
WHERE comparison_id = %(comparison_id)s
ORDER BY number
LIMIT %(limit)s
