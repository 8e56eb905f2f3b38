-- Records a comparison with all its prompts and the verdicts of a judge, whole or not at all. One row: its id.
WITH comparison AS (
    INSERT INTO training_comparisons (
        user_id, base_model, contestants, options, held_out, notes, prompts_are_held_out
    )
    VALUES (
        %(user_id)s, %(base_model)s, %(contestants)s, %(options)s, %(held_out)s, %(notes)s, %(prompts_are_held_out)s
    )
    RETURNING id
), answers AS (
    INSERT INTO training_comparison_answers (comparison_id, number, turns, reference, answers)
    SELECT comparison.id, given.number, given.turns, given.reference, given.answers
    FROM comparison,
        jsonb_to_recordset(%(prompts)s) AS given (number integer, turns jsonb, reference text, answers jsonb)
), verdicts AS (
    INSERT INTO training_votes (comparison_id, number, one, two, kind, voter, turned, choice, said, voted_at)
    SELECT comparison.id, given.number, given.one, given.two, 'judge', given.voter, false, given.choice, given.said,
        clock_timestamp()
    FROM comparison,
        jsonb_to_recordset(%(verdicts)s) AS given (
            number integer, one smallint, two smallint, voter text, choice text, said jsonb
        )
)
SELECT id FROM comparison
