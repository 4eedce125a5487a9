"""Images of requests: fetched, decoded and cut into patches, by rules that hold for strangers' files."""
