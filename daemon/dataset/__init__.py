"""A job's data onto this disk: fetched once, checked against the owner's rights, or prefetched before the claim.
The attempt calls it; what is wrong with the data ends the job before a model is loaded."""
