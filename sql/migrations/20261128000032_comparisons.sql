-- Comparisons of adapters with each other and with their base model: what each answered, and who preferred what.

SET LOCAL lock_timeout = '1s';

-- `contestants` is a list, the base model first: name, job_id, adapter_sha256, about. Other columns name a contestant by
-- its place in it. No foreign key to jobs: what was compared stays true when a job's row is gone. All jobs of a
-- comparison belong to its user.
CREATE TABLE IF NOT EXISTS public.training_comparisons (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    user_id uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
    base_model text NOT NULL,
    contestants jsonb NOT NULL,
    options jsonb NOT NULL,
    held_out jsonb NOT NULL,
    notes jsonb NOT NULL,
    prompts_are_held_out boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    CONSTRAINT training_comparisons_two_or_more
        CHECK (jsonb_typeof(contestants) = 'array' AND jsonb_array_length(contestants) >= 2)
);

CREATE INDEX IF NOT EXISTS training_comparisons_of_user ON public.training_comparisons (user_id, created_at);
CREATE INDEX IF NOT EXISTS training_comparisons_newest ON public.training_comparisons (created_at);

-- One prompt: its turns, the answer that the data have there, and each contestant's answer in the contestants' order.
CREATE TABLE IF NOT EXISTS public.training_comparison_answers (
    comparison_id uuid NOT NULL REFERENCES public.training_comparisons (id) ON DELETE CASCADE,
    number integer NOT NULL,
    turns jsonb NOT NULL,
    reference text,
    answers jsonb NOT NULL,
    CONSTRAINT training_comparison_answers_pkey PRIMARY KEY (comparison_id, number),
    CONSTRAINT training_comparison_answers_numbered CHECK (number >= 1)
);

-- One voter's choice between the answers of contestants `one` and `two`. The row is there before the choice: it is made
-- when the pair is shown, with the order in which it was shown, so that no page decides that order. `voter_key` tells
-- the holders of one of the gateway's keys from those of another. A judge is a model; `said` holds its words.
CREATE TABLE IF NOT EXISTS public.training_votes (
    comparison_id uuid NOT NULL,
    number integer NOT NULL,
    one smallint NOT NULL,
    two smallint NOT NULL,
    kind text NOT NULL,
    voter text NOT NULL,
    voter_key text NOT NULL DEFAULT '',
    turned boolean NOT NULL,
    choice text,
    said jsonb,
    shown_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    voted_at timestamptz,
    CONSTRAINT training_votes_pkey PRIMARY KEY (comparison_id, number, one, two, kind, voter, voter_key),
    CONSTRAINT training_votes_of_an_answer FOREIGN KEY (comparison_id, number)
        REFERENCES public.training_comparison_answers (comparison_id, number) ON DELETE CASCADE,
    CONSTRAINT training_votes_of_two CHECK (one >= 0 AND one < two),
    CONSTRAINT training_votes_kind_known CHECK (kind IN ('person', 'judge')),
    CONSTRAINT training_votes_choice_known CHECK (choice IN ('one', 'two', 'tie')),
    CONSTRAINT training_votes_voted_at_once CHECK ((choice IS NULL) = (voted_at IS NULL)),
    CONSTRAINT training_votes_voter_short CHECK (length(voter) <= 200)
);

REVOKE ALL ON public.training_comparisons, public.training_comparison_answers, public.training_votes
    FROM PUBLIC, anon, authenticated, service_role;
GRANT SELECT ON public.training_comparisons, public.training_comparison_answers, public.training_votes
    TO authenticated, service_role;
-- Its prompts and votes go with it.
GRANT DELETE ON public.training_comparisons TO service_role;
GRANT SELECT, INSERT ON public.training_comparisons, public.training_comparison_answers, public.training_votes
    TO training_daemon;
GRANT UPDATE (choice, voted_at) ON public.training_votes TO training_daemon;

ALTER TABLE public.training_comparisons ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_comparison_answers ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_votes ENABLE ROW LEVEL SECURITY;

DO $$
DECLARE
    of_own_comparison constant text :=
        'EXISTS (SELECT FROM public.training_comparisons AS comparison '
        'WHERE comparison.id = comparison_id AND comparison.user_id = (SELECT auth.uid()))';
    rule record;
BEGIN
    FOR rule IN
        SELECT * FROM (VALUES
            ('training_comparisons', 'SELECT', 'authenticated', '(SELECT auth.uid()) = user_id', NULL),
            ('training_comparison_answers', 'SELECT', 'authenticated', of_own_comparison, NULL),
            -- A pair that is only shown tells which answer is whose.
            ('training_votes', 'SELECT', 'authenticated', 'choice IS NOT NULL AND ' || of_own_comparison, NULL),
            ('training_comparisons', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_comparison_answers', 'ALL', 'training_daemon', 'true', 'true'),
            ('training_votes', 'ALL', 'training_daemon', 'true', 'true')
        ) AS rules (relation, verb, grantee, visible, admitted)
    LOOP
        EXECUTE format('DROP POLICY IF EXISTS %I ON public.%I',
            'trainer_' || rule.grantee || '_' || lower(rule.verb), rule.relation);
        EXECUTE format('CREATE POLICY %I ON public.%I FOR %s TO %I %s %s',
            'trainer_' || rule.grantee || '_' || lower(rule.verb), rule.relation, rule.verb, rule.grantee,
            'USING (' || rule.visible || ')', 'WITH CHECK (' || rule.admitted || ')');
    END LOOP;
END
$$;
