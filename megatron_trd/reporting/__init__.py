"""A finished or running job for people: files to plain numbers, numbers to charts, charts to one page."""
