-- Reads what a voter is asked next about two contestants: the first prompt without his choice, with the order that was
-- drawn for him, null if none is yet. Without a prompt left, `number` is null. No row means that there is no such
-- comparison.
SELECT
    (SELECT count(*) FROM public.training_comparison_answers AS answer WHERE answer.comparison_id = comparison.id)
        AS prompts,
    (
        SELECT count(*) FROM public.training_votes AS vote
        WHERE vote.comparison_id = comparison.id AND vote.one = %(one)s AND vote.two = %(two)s
          AND vote.kind = 'person' AND vote.voter = %(voter)s AND vote.voter_key = %(voter_key)s
          AND vote.choice IS NOT NULL
    ) AS done,
    jsonb_array_length(comparison.contestants) AS contestants,
    next.number,
    next.turns,
    next.answers,
    next.turned
FROM public.training_comparisons AS comparison
LEFT JOIN LATERAL (
    SELECT answer.number, answer.turns, answer.answers, vote.turned
    FROM public.training_comparison_answers AS answer
    LEFT JOIN public.training_votes AS vote
        ON vote.comparison_id = answer.comparison_id AND vote.number = answer.number
        AND vote.one = %(one)s AND vote.two = %(two)s
        AND vote.kind = 'person' AND vote.voter = %(voter)s AND vote.voter_key = %(voter_key)s
    WHERE answer.comparison_id = comparison.id
      AND vote.choice IS NULL
    ORDER BY answer.number
    LIMIT 1
) AS next ON true
WHERE comparison.id = %(comparison_id)s
