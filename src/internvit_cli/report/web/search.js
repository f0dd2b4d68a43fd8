// Find images by their keys, including skipped ones, which show their reason.

const MOST_HITS = 100;

/** A search over keys, which are case-folded once. */
class KeySearch {
  constructor() {
    this.keys = images.keys.map((key) => key.toLowerCase());
    this.skipped = data.skipped.rows.map((row) => row.key.toLowerCase());
  }

  /** Return the indices of images, and of skipped ones, whose key contains a text. */
  find(text) {
    const wanted = text.trim().toLowerCase();
    if (!wanted) return null;
    const having = (keys) => keys.flatMap((key, number) => (key.includes(wanted) ? [number] : []));
    return { images: having(this.keys), skipped: having(this.skipped) };
  }
}

/** Create the search field, the number of hits, and their list. */
function searchBox(onFound, onChoose) {
  const search = new KeySearch();
  const told = make('p', { class: 'faint', role: 'status', id: 'found' });
  const list = make('ul', { class: 'hits', 'aria-label': 'Images found' });
  let waiting = 0;
  const answer = () => {
    const hits = search.find(field.value);
    onFound(hits ? hits.images : []);
    list.replaceChildren();
    told.textContent = '';
    if (!hits) return;
    const skipped = hits.skipped.length ? `, and ${count(hits.skipped.length)} skipped` : '';
    const some = images.keys.length < data.map.of ? ' among those on the map' : '';
    const first = hits.images.length > MOST_HITS ? ` (the first ${MOST_HITS} listed)` : '';
    told.textContent = `${plural(hits.images.length, 'image')}${some}${first}${skipped}`;
    const button = (image) => make('button', { type: 'button', onclick: () => onChoose(image) }, images.keys[image]);
    list.append(...hits.skipped.slice(0, MOST_HITS).map((number) => make('li', {}, skippedHit(data.skipped.rows[number]))));
    list.append(...hits.images.slice(0, MOST_HITS).map((image) => make('li', {}, button(image))));
  };
  const field = make('input', {
    type: 'search', id: 'search', placeholder: 'part of a key', autocomplete: 'off', spellcheck: 'false',
    oninput: () => {
      clearTimeout(waiting);
      waiting = setTimeout(answer, 80);
    },
    onkeydown: (event) => {
      if (event.key === 'Enter') list.querySelector('button')?.click();
    },
  });
  return { field, told, list };
}

function skippedHit(row) {
  const why = row.message ? `${words(row.reason)}: ${row.message}` : words(row.reason);
  return make('div', { class: 'skipped' }, `${row.key} was skipped (${why})`);
}
