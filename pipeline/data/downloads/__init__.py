"""Downloads of images from the web, for lists of URLs.

    config      DownloadConfig: limits, time-outs, who we say we are     addresses   which hosts may be reached
    fetch       one address -> the bytes of an image, or a reason        robots      robots.txt and X-Robots-Tag
    stream      many addresses at a time, results in order               limits      requests to one host

`stream.download` is the entry. HTTP itself is aiohttp's. Nothing here knows tables, keys or labels (`sources.urls` does).
"""
