-- Reads the policies that can keep rows from us; with `policy` null, the tables that no policy lets us see.
-- No row means that row security hides nothing from us.
SELECT hiding.relation, hiding.policy, hiding.verb, hiding.condition
FROM training_hiding_policies() AS hiding
