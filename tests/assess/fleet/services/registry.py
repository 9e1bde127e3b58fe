import http.server

server = http.server.HTTPServer(("0.0.0.0", 7200), http.server.BaseHTTPRequestHandler)
server.serve_forever()
