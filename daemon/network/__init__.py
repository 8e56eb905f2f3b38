"""Makes requests to URLs that tenants wrote, and to endpoints that the operator configured. The first reach no private
address; a credential goes to the endpoint that it was configured for, and nowhere else. All clients come from here."""
