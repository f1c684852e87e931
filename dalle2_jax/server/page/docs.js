// The page /docs: the routes and parameters of openapi.json.

const element = (name, text = "", className = "") => {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
};

const typeOf = (schema) => {
  if (schema.anyOf) return schema.anyOf.map(typeOf).filter((kind) => kind !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.format === "binary") return "file";
  const low = schema.minimum ?? schema.minLength, high = schema.maximum ?? schema.maxLength;
  const range = low === undefined && high === undefined ? "" : ` ${low ?? ""}–${high ?? ""}`;
  return `${schema.type ?? "any"}${range}`;
};

const parameters = (schema) => {
  const table = element("table");
  for (const [name, about] of Object.entries(schema.properties)) {
    const row = element("tr");
    const required = (schema.required ?? []).includes(name);
    row.append(element("td", name), element("td", typeOf(about)), element("td", required ? "required" : about.description ?? ""));
    table.append(row);
  }
  return table;
};

const described = (path, method, route) => {
  const section = element("details");
  section.append(element("summary", `${method.toUpperCase()} ${path}`), element("p", route.description ?? ""));
  for (const [kind, content] of Object.entries(route.requestBody?.content ?? {})) {
    section.append(element("p", kind, "kind"), parameters(content.schema));
  }
  return section;
};

const response = await fetch("openapi.json");
const { paths } = await response.json();
const routes = document.getElementById("routes");
routes.replaceChildren(
  ...Object.entries(paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, route]) => described(path, method, route))),
);
