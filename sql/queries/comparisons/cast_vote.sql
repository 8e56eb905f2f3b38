-- Writes a voter's choice of a pair that was shown to him: left, right or tie, as he saw it. Again the same changes
-- nothing, another one replaces it. No row means that this pair was never shown to this voter.
UPDATE training_votes
SET choice = CASE WHEN %(side)s = 'tie' THEN 'tie' WHEN (%(side)s = 'left') = turned THEN 'two' ELSE 'one' END,
    voted_at = clock_timestamp()
WHERE comparison_id = %(comparison_id)s
  AND number = %(number)s
  AND one = %(one)s
  AND two = %(two)s
  AND kind = 'person'
  AND voter = %(voter)s
  AND voter_key = %(voter_key)s
RETURNING choice
