-- Draws the order in which a voter sees the two answers to a prompt, once: a second call finds the row that is there.
INSERT INTO training_votes (comparison_id, number, one, two, kind, voter, voter_key, turned)
SELECT answer.comparison_id, answer.number, %(one)s, %(two)s, 'person', %(voter)s, %(voter_key)s, random() < 0.5
FROM training_comparison_answers AS answer
WHERE answer.comparison_id = %(comparison_id)s
  AND answer.number = %(number)s
ON CONFLICT DO NOTHING
