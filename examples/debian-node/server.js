// A small application that remembers something: how often it was asked.
const http = require("node:http");

let count = 0;
const server = http.createServer((request, response) => {
  count += 1;
  response.end(`request ${count}\n`);
});
server.listen(8080, () => console.log("listening on port 8080"));
process.on("SIGTERM", () => process.exit(0));
