"""The tabs of the studio's page, one each: what stands where, and which function answers which button."""
