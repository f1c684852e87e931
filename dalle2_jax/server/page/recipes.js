// Recipes: all that is needed to generate images again. In links, and in the gallery of this browser.

const MAX_LINK = 200_000;

export function toLink(recipe) {
  const bytes = new TextEncoder().encode(JSON.stringify(recipe));
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const hash = text.replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return hash.length > MAX_LINK ? null : `#${hash}`;
}

export function fromLink(hash) {
  try {
    const text = atob(hash.slice(1).replaceAll("-", "+").replaceAll("_", "/"));
    const recipe = JSON.parse(new TextDecoder().decode(Uint8Array.from(text, (letter) => letter.charCodeAt(0))));
    return typeof recipe.command === "string" ? recipe : null;
  } catch {
    return null;
  }
}

const MAX_KEPT = 60;

function store(mode) {
  return new Promise((resolve, reject) => {
    const opening = indexedDB.open("dalle2", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("results", { autoIncrement: true });
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => resolve(opening.result.transaction("results", mode).objectStore("results"));
  });
}

const answered = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

// Keeps {recipe, images} in this browser, and forgets the oldest.
export async function keep(result) {
  const results = await store("readwrite");
  await answered(results.add(result));
  const keys = await answered(results.getAllKeys());
  for (const old of keys.slice(0, Math.max(0, keys.length - MAX_KEPT))) await answered(results.delete(old));
}

export const kept = async () => (await answered((await store("readonly")).getAll())).reverse();

export const forget = async () => answered((await store("readwrite")).clear());
