"""Creates a container in an Azure emulator: container.py ENDPOINT ACCOUNT KEY NAME (the shared-key signature of
Microsoft's documentation, because object_store cannot create containers)."""

import base64
import email.utils
import hashlib
import hmac
import sys
import urllib.request

endpoint, account, key, name = sys.argv[1:]
date = email.utils.formatdate(usegmt=True)
headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
canonical = "".join(f"{k}:{v}\n" for k, v in sorted(headers.items()))
# Emulators name the account in the path as well.
text = "PUT" + "\n" * 12 + canonical + f"/{account}/{account}/{name}\nrestype:container"
signature = base64.b64encode(hmac.new(base64.b64decode(key), text.encode(), hashlib.sha256).digest()).decode()
headers |= {"Authorization": f"SharedKey {account}:{signature}", "Content-Length": "0"}
request = urllib.request.Request(f"{endpoint}/{account}/{name}?restype=container", method="PUT", headers=headers)
assert urllib.request.urlopen(request).status == 201
