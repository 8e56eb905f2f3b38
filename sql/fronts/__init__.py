"""Other tables of an app as a front of the queue: optional migrations, applied by `migrate --front NAME`. The line
`-- front of:` names the tables of the app that a file needs."""
