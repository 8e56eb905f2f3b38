-- Reads all choices between two contestants that were made, of people and of judges.
SELECT number, one, two, kind, voter, voter_key, choice, said
FROM public.training_votes
WHERE comparison_id = %(comparison_id)s
  AND choice IS NOT NULL
ORDER BY one, two, number, kind, voter
