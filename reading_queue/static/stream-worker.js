// One event stream a browser, shared by its tabs: HTTP/1.1 gives a browser six connections to a host.
const ports = new Set();
let source = null;

function open() {
  source = new EventSource("/stream");
  for (const name of ["ready", "changed", "signed-out"]) {
    source.addEventListener(name, () => tell(name));
  }
  source.onerror = () => {
    tell("lost");
    if (source.readyState === EventSource.CLOSED) setTimeout(open, 3000); // 401 or 5xx: the browser gives up, we do not
  };
}

function tell(name) {
  for (const port of ports) port.postMessage(name);
}

self.onconnect = (event) => {
  const port = event.ports[0];
  ports.add(port);
  port.onmessage = () => ports.delete(port); // "bye"
  if (!source) open();
  else port.postMessage(source.readyState === EventSource.OPEN ? "ready" : "lost");
};
