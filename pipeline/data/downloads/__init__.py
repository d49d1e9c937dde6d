"""Downloads of images from the web, for lists of URLs.

    config      DownloadConfig: limits, time-outs, user agent        addresses   restriction of hosts
    fetch       one address -> the bytes of an image, or a reason    robots      robots.txt and X-Robots-Tag
    stream      many addresses in parallel, results in order         limits      requests to one host

`stream.download` is the entry. The HTTP client is aiohttp. Tables, keys and labels are handled in `sources.urls`.
"""
