"""Brings a job's data onto this disk: fetched once, the owner's access checked, or prefetched before the claim.
The attempt calls it. Invalid data ends the job before a model is loaded."""
