-- Reads whether a delivery is due that this host may take. Always one row.
SELECT EXISTS (
    -- include: due_deliveries
) AS due
