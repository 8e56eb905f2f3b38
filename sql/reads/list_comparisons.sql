-- Lists the newest comparisons with the number of their prompts and of people's votes.
SELECT
    comparison.id,
    comparison.user_id,
    comparison.base_model,
    comparison.contestants,
    comparison.held_out,
    comparison.prompts_are_held_out,
    comparison.created_at,
    (SELECT count(*) FROM public.training_comparison_answers AS answer WHERE answer.comparison_id = comparison.id)
        AS prompts,
    (
        SELECT count(*) FROM public.training_votes AS vote
        WHERE vote.comparison_id = comparison.id AND vote.kind = 'person' AND vote.choice IS NOT NULL
    ) AS votes
FROM public.training_comparisons AS comparison
ORDER BY comparison.created_at DESC
LIMIT %(limit)s
