"""What we say to the database, one statement to a file, a room for each subject. No two have the same name."""
